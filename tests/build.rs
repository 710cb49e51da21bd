// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Generates the messages of `protos/`, in pure Rust: no `protoc` is needed.

use std::path::Path;
use std::{env, fs, io};

use ttrpc_codegen::{Codegen, ProtobufCustomize};

fn main() -> io::Result<()> {
    println!("cargo:rerun-if-changed=protos");
    let out = env::var("OUT_DIR").map_err(io::Error::other)?;
    Codegen::new()
        .out_dir(&out)
        .include("protos")
        .input("protos/cri.proto")
        .rust_protobuf()
        .rust_protobuf_customize(ProtobufCustomize::default().lite_runtime(true))
        .run()?;
    // The generated file begins with inner attributes, which `include!` refuses: it has to be a module.
    fs::write(
        Path::new(&out).join("modules.rs"),
        "#[doc = \"Messages of `cri.proto`.\"]\npub mod cri;\n",
    )
}
