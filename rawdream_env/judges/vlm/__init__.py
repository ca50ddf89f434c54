"""Vision-language models as judges: behind a vLLM server or in this process."""
