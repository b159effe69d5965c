"""The engine: schedule -> run -> commit, in a process of its own."""
