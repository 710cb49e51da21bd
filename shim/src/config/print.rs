// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The effective configuration, for people: a configuration file in which each line says where its value comes from.

use std::fmt::Write as _;

use super::{Config, Origin, TABLES};

impl Config {
    /// The effective configuration in the format of configuration files, with the origin of each value. Without `all`,
    /// only what somebody has set.
    pub fn describe(&self, all: bool) -> String {
        let mut text = format!("# {}\n", self.path.display());
        for table in TABLES {
            let keys: Vec<_> = table
                .keys()
                .iter()
                .filter(|key| all || *self.origin(key) != Origin::Default)
                .collect();
            if keys.is_empty() {
                continue;
            }
            // Writing into a string succeeds.
            let _ = writeln!(text, "\n[{}]", table.header());
            for key in keys {
                let (name, value) = (key.name, (key.get)(self));
                let asked = self.asked.get(&(key.table, key.name)).filter(|asked| **asked != value);
                let asked = asked.map(|asked| format!("; asked for: {asked}")).unwrap_or_default();
                let _ = writeln!(text, "{name} = {value} # {}{asked}", self.origin(key));
            }
        }
        text
    }
}
