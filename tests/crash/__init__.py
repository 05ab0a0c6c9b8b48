"""Kills servers and workers at random moments and looks whether anything that was accepted got lost."""
