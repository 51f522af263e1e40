"""Servers behind one small protocol: command line, environment, health, log patterns."""
