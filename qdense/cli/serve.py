"""`qdense serve`"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
from pathlib import Path
from socket import socket

from qdense.cli.arguments import add_base, asked_base, positive, tell, tell_notice
from qdense.errors import QDenseError
from qdense.libraries import quiet_libraries, require_library
from qdense.text import clean

HELP = "serve adapters and their base to OpenAI clients"
DESCRIPTION = (
    "Serve a base and adapters for it on an OpenAI-compatible address: /v1/chat/completions, /v1/completions, /v1/models. "
    "Clients choose by model name; their requests share one batch. Ctrl-C stops the server after the answers in progress. "
    'Needs "qdense[serve]".'
)
EXAMPLES = """\
  qdense serve runs/questions
  qdense serve brief=runs/questions-brief long=runs/questions-long --port 8080
  QDENSE_API_KEY=... qdense serve runs/questions --host 0.0.0.0
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="*",
        help="a run's or an adapter's folder, or OWNER/NAME on the hub; NAME=RUN gives it a name for clients (default: its "
        "folder's). Without any, --model is served bare, or the newest finished run",
    )
    add_base(parser, alone="; without a RUN, it is served bare")
    parser.add_argument(
        "--host", default="127.0.0.1", help="the address to listen on (default: 127.0.0.1, this machine)"
    )
    parser.add_argument("--port", type=_port, default=8000, help="the port (default: 8000)")
    parser.add_argument(
        "--no-key",
        action="store_true",
        help="admit every client of this machine; else they must send QDENSE_API_KEY, or where it is not set, a key that is "
        "printed at the start",
    )
    parser.add_argument(
        "--max-length",
        type=positive,
        metavar="N",
        help="tokens of a prompt and its answer (default: 4096, or the model's limit)",
    )
    parser.add_argument(
        "--batch-size",
        type=positive,
        metavar="N",
        help="answers in progress at a time (default: as many as fit, at most 64)",
    )
    parser.add_argument(
        "--queue",
        type=positive,
        metavar="N",
        default=256,
        help="requests that may wait; more are refused (default: 256)",
    )


def _port(text: str) -> int:
    number = positive(text)
    if number > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: a whole number from 1 to 65535")
    return number


def run(arguments: argparse.Namespace) -> None:
    for name in ("fastapi", "uvicorn"):
        require_library(name, extra="serve", purpose="qdense serve")
    quiet_libraries()
    import uvicorn

    from qdense.inference.engine import Engine
    from qdense.inference.loaded import load_model
    from qdense.inference.server import LOOPBACK, make_app
    from qdense.modeling.locate import locate_adapter
    from qdense.runs import newest_finished_run

    if arguments.no_key and arguments.host not in LOOPBACK:
        raise QDenseError(
            f"--no-key: everyone who reaches {arguments.host} could use this server. Omit --no-key, or --host."
        )

    runs = list(arguments.runs)
    if not runs and arguments.model is None:
        runs = [str(newest_finished_run(Path("runs")).path)]
    folders = {name: locate_adapter(path, tell) for name, path in _named(runs).items()}
    loaded = load_model(folders, tell_notice, model=asked_base(arguments), template=arguments.template)
    base_name = loaded.base.name if loaded.base.name not in folders else f"{loaded.base.name}-base"
    engine = Engine(
        loaded, most_running=arguments.batch_size, most_waiting=arguments.queue, max_length=arguments.max_length
    )
    key = None if arguments.no_key else os.environ.get("QDENSE_API_KEY") or secrets.token_urlsafe(24)
    host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                _announce(f"http://{host}:{arguments.port}/v1", [base_name, *folders], engine.most_running, key)

    config = uvicorn.Config(
        make_app(engine, base_name, key),
        host=arguments.host,
        port=arguments.port,
        log_level="warning",
        access_log=False,
        limit_concurrency=arguments.queue + engine.most_running + 64,  # connections
        timeout_graceful_shutdown=60,
    )
    try:
        Server(config).run()
    except SystemExit as error:  # uvicorn's, after it has said why
        raise QDenseError(
            f"cannot listen on {host}:{arguments.port}: another program may use that port. Choose another with --port."
        ) from error
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
    finally:
        engine.close()


def _named(runs: list[str]) -> dict[str, Path]:
    """Name and folder of each RUN or NAME=RUN."""
    named: dict[str, Path] = {}
    for run in runs:
        name, has_name, path = run.partition("=")
        if not has_name or Path(run).exists():
            name, path = "", run
        folder = Path(path)
        name = name or (folder.parent if folder.name == "adapter" else folder).resolve().name
        if name in named:
            raise QDenseError(f'two runs would be called "{name}": {named[name]} and {path}. Name one: NAME={path}')
        named[name] = folder
    return named


def _announce(address: str, names: list[str], most_running: int, key: str | None) -> None:
    key_text = f"API key: {key}" if key and not os.environ.get("QDENSE_API_KEY") else "API key: that of QDENSE_API_KEY"
    print(f"serving {', '.join(map(clean, names))} at {address}, {most_running} answers at a time", flush=True)
    print("no key is needed" if key is None else key_text, flush=True)
