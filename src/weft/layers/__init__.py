"""Layers that hold any structured matrix and stand where the dense layer stood."""
