"""The kernel's ground floor: contracts, discovery, configuration. Importing it never imports torch."""
