"""Keep-sets that are found by running the model: layers judged as they would run, sets judged by their answers."""
