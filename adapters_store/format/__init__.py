"""Read and write an adapter's files: folder, manifest, upload archive, safetensors and JSON."""
