"""What crosses the wire: its encoding, and the transforms around an update."""
