REQUIRED = ("transformers", "jinja2", "matplotlib", "scipy")
