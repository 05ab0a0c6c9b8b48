"""The page: Fooocus' layout on Gradio, made from the parameter declarations; it only translates in and out."""
