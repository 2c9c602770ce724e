"""Storage: paths and URLs, atomic writes, temporary folders, outputs of commands, logins in addresses."""
