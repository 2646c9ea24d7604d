"""Guard models as judges: how each is asked, how its answer is read, and who puts the question to it."""
