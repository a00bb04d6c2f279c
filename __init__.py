"""ComfyUI finds its door here; importing this file does no work."""
