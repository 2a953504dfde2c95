"""What reads files of unknown origin, fed with files that are none: read or refused, nothing else."""
