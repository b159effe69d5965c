"""The bytes of an artifact: folder, manifest, archive, safetensors and strict JSON."""
