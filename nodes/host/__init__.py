"""Everything that touches ComfyUI's own objects, a file for each kind of them."""
