"""Read, check, compile and store adapters: shared by server and training, which never import each other."""
