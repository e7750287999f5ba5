"""Configurations (.gin files) and the one module that reads them."""
