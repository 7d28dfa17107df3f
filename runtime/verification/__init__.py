"""How far two models are apart, detection by detection and stage by stage."""
