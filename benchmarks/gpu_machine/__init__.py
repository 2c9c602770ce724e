"""Two runs of five minutes on a bare GPU machine: `prepare.sh` here, then `first.sh` and `second.sh` there."""
