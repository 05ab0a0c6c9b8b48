"""Focale: from a request to a picture, one file per step."""
