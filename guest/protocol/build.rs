// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Generates messages and service bindings from `protos/`, in pure Rust: no `protoc` is needed.

use std::path::Path;
use std::{env, fs, io};

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

const FILES: [&str; 5] = ["agent", "csi", "health", "oci", "types"];
const SERVICES: [&str; 2] = ["agent", "health"];

fn main() -> io::Result<()> {
    println!("cargo:rerun-if-changed=protos");
    let out = env::var("OUT_DIR").map_err(io::Error::other)?;

    Codegen::new()
        .out_dir(&out)
        .include("protos")
        .inputs(FILES.map(|name| format!("protos/{name}.proto")))
        .rust_protobuf()
        .rust_protobuf_customize(ProtobufCustomize::default().lite_runtime(true))
        .customize(Customize { async_all: true, ..Default::default() })
        .run()?;

    // The generated files begin with inner attributes, which `include!` refuses: each has to be a module of its own.
    let modules: String =
        FILES
            .iter()
            .map(|name| module(name, &format!("Messages of `{name}.proto`.")))
            .chain(SERVICES.iter().map(|name| {
                module(&format!("{name}_ttrpc"), &format!("Service of `{name}.proto`."))
            }))
            .collect();
    fs::write(Path::new(&out).join("modules.rs"), modules)
}

/// A module whose file lies beside the list: without an absolute path in it, the same code is built in any directory.
fn module(name: &str, doc: &str) -> String {
    // The generator gives its clients no Debug, and takes services by value that it only clones.
    format!(
        "#[doc = {doc:?}]\n\
         #[allow(missing_debug_implementations, clippy::needless_pass_by_value)]\n\
         pub mod {name};\n"
    )
}
