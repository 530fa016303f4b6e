"""The command line: one small file a verb; nothing heavy is imported before a verb needs it."""
