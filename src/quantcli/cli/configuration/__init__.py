"""Pass configurations in JSON: read, checked against one table, and put among the flags of a command line."""
