"""Adapters that add a recipe's Distiller to a trainer, one package for each trainer (host)."""
