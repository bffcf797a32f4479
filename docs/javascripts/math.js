// Renders what the extension arithmatex has marked, once the page is there. A faulty formula stays as it was written, and
// the console says so: tests look there.
document.addEventListener("DOMContentLoaded", () => {
  for (const element of document.querySelectorAll(".arithmatex")) {
    const source = element.textContent.trim();
    try {
      katex.render(source.slice(2, -2), element, { displayMode: source.startsWith("\\[") });
    } catch (error) {
      console.error(error.message);
    }
  }
});
