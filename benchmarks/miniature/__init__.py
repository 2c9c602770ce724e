"""Short real trainings on drawn data: the paper's findings in small, and a table of trials for samplers."""
