"""`vqa-worker check`: a doctor, who looks at each setting and at all that the worker depends on."""
