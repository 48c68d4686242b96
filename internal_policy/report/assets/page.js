(function () {
  "use strict";
  var page = window.internalPolicy, root = document.documentElement, toggle = document.getElementById("theme");
  var system = window.matchMedia("(prefers-color-scheme: dark)"), print = window.matchMedia("print");
  var opened = [];

  function dark() { return (root.dataset.theme || (system.matches ? "dark" : "light")) === "dark"; }

  function name() {
    toggle.textContent = dark() ? "Light" : "Dark";
    toggle.setAttribute("aria-label", dark() ? "Switch to light colours" : "Switch to dark colours");
  }

  toggle.addEventListener("click", function () {
    root.dataset.theme = dark() ? "light" : "dark";
    try { window.localStorage.setItem("internal-policy-theme", root.dataset.theme); } catch (error) { /* for this visit only */ }
    name();
    page.paintAll();
  });
  system.addEventListener("change", function () { name(); page.paintAll(); });

  // A printed page has one width, and what is folded cannot be opened there.
  function printing(on) {
    if (on === root.classList.contains("printing")) return;
    root.classList.toggle("printing", on);
    if (on) {
      opened = Array.prototype.filter.call(document.querySelectorAll("details"), function (d) { return !d.open && !d.hasAttribute("data-unprinted"); });
      opened.forEach(function (d) { d.open = true; });
    } else {
      opened.forEach(function (d) { d.open = false; });
    }
    page.paintAll();
  }
  window.addEventListener("beforeprint", function () { printing(true); });
  window.addEventListener("afterprint", function () { printing(false); });
  print.addEventListener("change", function (event) { printing(event.matches); });

  document.querySelectorAll("[data-copy]").forEach(function (button) {
    var source = document.getElementById(button.dataset.copy);
    button.addEventListener("click", function () {
      var done = function () { button.textContent = "Copied"; setTimeout(function () { button.textContent = "Copy"; }, 1500); };
      var select = function () { window.getSelection().selectAllChildren(source); button.textContent = "Selected"; };
      if (navigator.clipboard) navigator.clipboard.writeText(source.textContent).then(done, select);
      else select();
    });
  });

  name();
  root.classList.add("scripted");
  page.paintAll();
})();
