"""Serve an exported agent over HTTP: write its file, queue questions, and answer them."""
