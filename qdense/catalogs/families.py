"""What is known of each of Transformers' model types."""

# --- model types: which of them each part is known to be right for ------------------------------------------------------

# Their decoders' linear layers have LLaMA's names: an adapter finds its targets without being told.
LLAMA_NAMED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "smollm3")
# Their attention is causal and nothing else (no soft cap, no sink; a window only where the configuration names one), so
# packed rows can be attended to one by one.
CAUSAL_ONLY = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
# Training on Liger's norms, rotary embeddings and SwiGLU is tested.
LIGER_TESTED = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
