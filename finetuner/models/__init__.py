"""Backbones (`zoo`, `vision`) and what makes embedding models of them (`tailor`)."""
