"""The server's half: sampling, combining, stepping."""
