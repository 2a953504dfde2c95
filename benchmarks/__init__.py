"""Scripts that measure speed and memory of Lorica beside plain fine-tuning and its peers; each says how to start it."""
