"""The engine (schedule -> run -> commit), its process, and the API process's client of it."""
