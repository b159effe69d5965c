"""Store artifacts by digest: in a directory or in a bucket."""
