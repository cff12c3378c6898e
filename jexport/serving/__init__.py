"""How other programs load an artifact: servers, their layouts, frameworks."""
