"""Where bytes live: paths and URLs, temporary folders, outputs of commands, logins in addresses."""
