(function () {
  "use strict";
  var kept = null;
  // A page from disk may have no storage, and asking for it may throw.
  try { kept = window.localStorage.getItem("internal-policy-theme"); } catch (error) { kept = null; }
  if (kept === "light" || kept === "dark") document.documentElement.dataset.theme = kept;
})();
