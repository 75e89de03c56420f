"""Commands: flags, tables and exit codes. Each command reads its flags, then imports what it needs."""
