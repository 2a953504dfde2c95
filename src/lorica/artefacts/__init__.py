"""Updates as artefacts: one update saved alone, put onto a model, taken off again, scaled, composed with others."""
