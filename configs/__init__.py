"""Complete runs, one YAML file each; installed as `chopgrad_configs`, so that a wheel carries them too."""
