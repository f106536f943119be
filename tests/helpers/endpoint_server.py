"""An OpenAI-compatible server in a separate process: `python endpoint_server.py LOG`. It prints its port.

The model's name chooses how it behaves. Every request is a line of LOG: path, key and body.
"""

import gzip
import json
import os
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ODD = [
    {"choices": [{}]},
    {"choices": [None]},
    {"choices": {"a": 1}},
    {"choices": [{"message": None}]},
    {"choices": [{"message": {"content": {"text": "7"}}}]},
    {"choices": [{"message": {"content": "7"}}], "usage": {"prompt_tokens": "many"}},
]
SEEN: dict[str, int] = {}
LOCK = threading.Lock()
UNDER_WAY = [0]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][0]["content"]
        with LOCK:
            UNDER_WAY[0] += 1
            attempt = SEEN[question] = SEEN.get(question, 0) + 1
            record = {"path": self.path, "key": self.headers["Authorization"], "under_way": UNDER_WAY[0], "body": body}
            with open(sys.argv[1], "a") as log:
                log.write(json.dumps(record) + "\n")
        try:
            self.behave(body["model"], question, attempt, body)
        finally:
            with LOCK:
                UNDER_WAY[0] -= 1

    def behave(self, model, question, attempt, body):
        if self.path != "/v1/chat/completions" or model == "unknown":
            return self.reply(404, {"error": {"message": f"no model {model} at {self.path}"}})
        if model == "locked":
            return self.reply(401, {"error": {"message": f"bad key {self.headers['Authorization']}"}})
        if model == "flaky":  # each item fails once, in one of four ways
            kind = sum(question.encode()) % 4 if attempt == 1 else None
            if kind == 0:
                return self.reply(429, {"error": {"message": "slow down"}}, {"Retry-After-Ms": "20"})
            if kind == 1:
                return self.reply(500, {"error": {"message": "oops"}})
            if kind == 2:
                self.close_connection = True
                return self.connection.shutdown(socket.SHUT_RDWR)
            if kind == 3:
                return self.reply(503, b"<html>busy</html>")
        if model == "garbage":
            return self.reply(200, b"<html>not json</html>")
        if model == "hollow":
            return self.reply(
                200, {"id": "x", "object": "chat.completion", "created": 1, "model": model, "choices": []}
            )
        if model == "odd":  # for each question another reply that is not a completion
            return self.reply(200, ODD[hash(question) % len(ODD)] | {"model": model})
        if model == "parts":
            content = [
                {"type": "text", "text": "The answer \ud83d"},
                {"type": "image"},
                {"type": "text", "text": " is 7."},
            ]
            usage = {"prompt_tokens": None}
            return self.reply(200, {"choices": [{"message": {"content": content}}], "usage": usage})
        if model == "modern" and "max_tokens" in body:
            return self.reply(
                400, {"error": {"message": "Unsupported parameter; use 'max_completion_tokens' instead."}}
            )
        if model == "mortal" and len(SEEN) > 5:
            os._exit(1)
        if model == "silent":
            time.sleep(30)
        if model == "nested":
            return self.reply(200, b"[" * 100_000, {"Content-Type": "application/json"})
        if model == "gzip":
            return self.reply(200, gzip.compress(b" " * 2**20), {"Content-Encoding": "gzip"})
        if model == "endless":
            return self.reply(200, b" " * (17 * 2**20))
        if model == "dripping":
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", "1000")
            self.end_headers()
            for _ in range(100):
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.05)
            return None
        time.sleep(0.02)
        number = sum(map(int, "".join(c if c.isdigit() else " " for c in question).split()))
        message = {"role": "assistant", "content": f"First, I think.\nThe answer is {number}."}
        reply = {
            "id": "x", "object": "chat.completion", "created": 1, "model": f"{model}-0613",
            "choices": [{"index": 0, "message": message, "finish_reason": "length" if number > 100 else "stop"}],
            "usage": {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18},
        }  # fmt: skip
        return self.reply(200, reply)

    def reply(self, status, body, headers=()):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if isinstance(body, bytes) else "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2]) if len(sys.argv) > 2 else 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()
