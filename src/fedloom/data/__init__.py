"""From rows to clients: sources, templates, encoding, partitions and the federation built of them."""
