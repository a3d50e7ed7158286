"""What experiments share: a cache of results, paired timing, and a record of the environment."""
