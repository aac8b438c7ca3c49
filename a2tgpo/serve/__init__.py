"""Serve an exported agent over HTTP. The modules write the agent's file, queue questions and define the endpoint."""
