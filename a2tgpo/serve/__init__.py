"""Serve an exported agent over HTTP: its protocol on disk, the queue of questions, the endpoint."""
