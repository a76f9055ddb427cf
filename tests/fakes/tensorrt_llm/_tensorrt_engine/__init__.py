"""The engine backend. Its LLM comes with the runtime half of the double."""
