"""What a model is scored on: the tasks, the rules that read an answer, generation, intervals."""
