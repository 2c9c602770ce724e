"""The presets as rows of the paper's tables: published, computed and reached here."""
