"""From a recipe and a task to an artifact: the stages in order, and what decides a version."""
